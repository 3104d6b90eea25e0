"""What a run's files show: reads metrics.jsonl and expert_load.jsonl, draws a picture and writes a page. No torch."""
