"""Numbers into pictures: distances embedded in the plane."""
