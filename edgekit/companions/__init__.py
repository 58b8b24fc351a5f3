"""What is trained beside a model, on the host: the verifier."""
