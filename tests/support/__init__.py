"""What several tests need: scripted stand-ins for vLLM and the trainer, and tasks whose scores are known."""
