"""What puts a test on a device, and what is tested on a GPU alone."""
