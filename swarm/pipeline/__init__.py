"""Pipeline: which fragments a peer holds, and how a microbatch finds its way through those who hold them."""
