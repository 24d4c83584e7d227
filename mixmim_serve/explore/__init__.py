"""What people do with features: nearest neighbours, near-doubles, a map; and pages of pictures to look at."""
