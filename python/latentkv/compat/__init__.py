"""Other engines' signatures on top of latentkv."""
