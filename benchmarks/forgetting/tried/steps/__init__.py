"""Steps that are made otherwise: other lengths, other directions."""
