"""From a hub name, a bucket or a folder to a loaded model and its tokenizer."""
