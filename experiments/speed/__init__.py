"""Speed beside PyTorch's: see __main__.py."""
