"""The ways to talk to a model: terminal, batch, API, web page."""
