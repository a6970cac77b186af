"""The project's own routes: captions, scores, vectors, and the pages; OpenAI's are in `deploy.openai`."""
