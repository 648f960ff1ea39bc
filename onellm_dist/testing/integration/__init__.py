"""The integration run: real media and a real pretrained LLM, from files to answers."""
