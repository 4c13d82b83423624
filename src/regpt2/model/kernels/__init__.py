"""The operations of a forward pass, each with the fast form that the device has."""
