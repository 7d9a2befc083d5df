"""Problems: read from a data set, checked, and handed out in a fixed order."""
