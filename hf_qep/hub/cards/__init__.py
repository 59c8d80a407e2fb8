"""The model card: from record, manifest, samples and the facts of the original to README.md."""
