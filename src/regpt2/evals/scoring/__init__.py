"""How evaluations score: texts and choices in, nats and accuracies out."""
