"""What a whole job costs, from a model's folder to the saved result, beside the jobs that a user would run instead."""
