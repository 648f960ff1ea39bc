"""The builder: from the samples that a source lists to a dataset."""
