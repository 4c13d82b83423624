"""Published results to compare with: scores (`scores`), loss curves (`curves`); the verdict on a run (`verdict`)."""
