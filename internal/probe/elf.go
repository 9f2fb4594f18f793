// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
)

// machines are the platforms that the image is for: what exit(0) is for each.
var machines = map[string]struct {
	machine elf.Machine
	code    []byte
}{
	"amd64": {elf.EM_X86_64, []byte{
		0x31, 0xff, // xor edi, edi: the status
		0xb8, 0x3c, 0, 0, 0, // mov eax, 60: exit (arch/x86/entry/syscalls/syscall_64.tbl)
		0x0f, 0x05, // syscall
	}},
	"arm64": {elf.EM_AARCH64, instructions(
		0xd2800000, // mov x0, #0: the status
		0xd2800ba8, // mov x8, #93: exit (include/uapi/asm-generic/unistd.h)
		0xd4000001, // svc #0
	)},
}

func instructions(words ...uint32) (code []byte) {
	for _, w := range words {
		code = binary.LittleEndian.AppendUint32(code, w)
	}
	return code
}

// program is a static executable for Linux that ends with status 0: the ELF header,
// one segment that is the file itself, and the code.
func program(architecture string) []byte {
	const (
		base  = 0x400000
		align = 0x10000 // the largest page of arm64
		start = 64 + 56 // after both headers
	)
	m := machines[architecture]
	size := uint64(start + len(m.code))
	header := elf.Header64{
		Type:      uint16(elf.ET_EXEC),
		Machine:   uint16(m.machine),
		Version:   uint32(elf.EV_CURRENT),
		Entry:     base + start,
		Phoff:     64,
		Ehsize:    64,
		Phentsize: 56,
		Phnum:     1,
		Shentsize: 64,
	}
	copy(header.Ident[:], elf.ELFMAG)
	header.Ident[elf.EI_CLASS] = byte(elf.ELFCLASS64)
	header.Ident[elf.EI_DATA] = byte(elf.ELFDATA2LSB)
	header.Ident[elf.EI_VERSION] = byte(elf.EV_CURRENT)
	segment := elf.Prog64{
		Type:  uint32(elf.PT_LOAD),
		Flags: uint32(elf.PF_R | elf.PF_X),
		Vaddr: base, Paddr: base,
		Filesz: size, Memsz: size,
		Align: align,
	}
	var file bytes.Buffer
	for _, part := range []any{header, segment, m.code} {
		if err := binary.Write(&file, binary.LittleEndian, part); err != nil {
			panic(err) // each has a fixed size
		}
	}
	return file.Bytes()
}
