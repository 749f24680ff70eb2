"""What several tests need: scripted processes that stand in for vLLM and for the trainer, and tasks whose scores are known."""
