"""What other packages need to take our SAEs as theirs. None of them is imported before it is asked for."""
