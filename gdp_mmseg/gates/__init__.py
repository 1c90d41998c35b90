"""Gates: how open each channel is, and the methods that move them."""
