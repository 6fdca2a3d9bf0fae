"""What `sdrt` can be told to do; those commands that have much to say for themselves."""
