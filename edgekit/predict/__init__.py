"""Memory and latency from a target and an artifact, always marked predicted."""
