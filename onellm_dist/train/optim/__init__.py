"""What trains, with which optimizer, at which learning rate."""
