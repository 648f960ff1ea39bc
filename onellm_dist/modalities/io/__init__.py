"""Decoders of media files, shared by training, the shard builder and previews."""
