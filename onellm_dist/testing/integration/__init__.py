"""The real rehearsal: real media and a real pretrained LLM through the whole path (`make rehearse-real`)."""
