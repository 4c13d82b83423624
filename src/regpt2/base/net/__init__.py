"""Files and answers from the network: an address in, bytes checked against a hash out."""
