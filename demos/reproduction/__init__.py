"""What the papers claim, measured: `demos/reproduce.py` runs it, `demos/REPRODUCTION.md` shows it."""
