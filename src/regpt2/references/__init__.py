"""What a result is held against: published scores (`scores`), loss curves (`curves`), and the verdict (`verdict`)."""
