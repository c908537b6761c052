"""Audio files to samples: what `pipelines.prepare` and a prompt both go through, so that both give the same tokens."""
