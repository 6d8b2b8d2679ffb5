"""Whether scores find the neurons that hold a set: facts planted in known columns, and neurons set to zero."""
