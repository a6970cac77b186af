"""How probable it is that a caption is right: a probability fitted on captions whose truth is known."""
