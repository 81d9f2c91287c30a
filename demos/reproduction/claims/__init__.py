"""One file for each topic; `registry.py` lists them."""
