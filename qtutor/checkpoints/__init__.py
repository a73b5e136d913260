"""Other people's models: one from PyPI, and any family to GGUF by llama.cpp's own converter."""
