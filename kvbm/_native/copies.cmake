# Sources of the copies module; a kernel's source alone gets its instruction set, chosen at run time.
set(KVBM_COPIES_SOURCES
  ${CMAKE_CURRENT_LIST_DIR}/copy_baseline.cpp
  ${CMAKE_CURRENT_LIST_DIR}/copy_dispatch.cpp
  ${CMAKE_CURRENT_LIST_DIR}/copy_engine.cpp
  ${CMAKE_CURRENT_LIST_DIR}/copy_threads.cpp)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND KVBM_COPIES_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/copy_avx2.cpp
    ${CMAKE_CURRENT_LIST_DIR}/copy_avx512.cpp)
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/copy_avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2")
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/copy_avx512.cpp PROPERTIES COMPILE_OPTIONS "-mavx512f")
endif()
