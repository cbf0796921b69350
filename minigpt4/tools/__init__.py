"""Tools that prepare files for the model; each is a command of its own."""
