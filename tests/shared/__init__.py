"""Code that test modules share: references, fixtures, stand-ins, and programs that tests start."""
