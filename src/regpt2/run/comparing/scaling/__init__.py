"""One recipe at several sizes or budgets: a power law, its intervals, a prediction checked on a size held out."""
