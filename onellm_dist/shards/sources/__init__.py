"""Sources: one module per dataset or format that shards can be built from."""
