# Sources of the disk_io module; what needs Linux leaves itself out elsewhere.
set(KVBM_DISK_IO_SOURCES
  ${CMAKE_CURRENT_LIST_DIR}/disk_calls.cpp
  ${CMAKE_CURRENT_LIST_DIR}/disk_queue.cpp
  ${CMAKE_CURRENT_LIST_DIR}/disk_ring.cpp)
