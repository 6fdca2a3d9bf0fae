"""Bundle to image: tokenizer, sampler tables, one session for each backend, the pipeline. No torch in sight."""
