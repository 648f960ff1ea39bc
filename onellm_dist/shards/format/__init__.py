"""The shard format: manifest, index, tars, and their readers and writers."""
