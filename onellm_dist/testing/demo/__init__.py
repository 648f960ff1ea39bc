"""`onellm demo`: everything once on the toy world, from shards to a report of captions."""
