"""The slow metrics of an SAE; `run.py` runs them all."""
