"""kvbm: the KV-cache block manager for LLM serving."""
