"""Chat: conversations as text, and answers to them."""
