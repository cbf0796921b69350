"""A small world that the real code runs on: scenes, tiny frozen backbones, and the script that trained them."""
