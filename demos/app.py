"""The live page on the bundled model: python demos/app.py, then open http://127.0.0.1:7860."""

import saehook
from saehook.app import serve

paths = [saehook.bundled("sae"), saehook.bundled("sae-mlp")]
saes = [saehook.load_sae(path) for path in paths]
hooked = saehook.HookedModel.from_pretrained(saehook.bundled("lm")).attach({str(sae.site): sae for sae in saes})
serve(hooked, sae_paths=dict(zip(hooked.sites, paths, strict=True)))
