"""Files that were made to do harm, disks that fail, and processes that are killed."""
