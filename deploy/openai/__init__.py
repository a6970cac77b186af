"""OpenAI's routes, for clients that speak them: chat completions, embeddings, models."""
