"""How evaluations score: what they may use (`context`), their data (`assets`), endings (`endings`), texts (`texts`)."""
