//! Assembles eBPF (Documentation/bpf/standardization/instruction-set.rst): instructions, and jumps whose targets come later. Programs
//! are ours; what is wrong with one is found by the kernel when it is loaded, and by tests.

use std::collections::HashMap;

/// Loads a word from memory.
pub(crate) const LOAD: u8 = 0x61;
/// Stores a word, or a double word.
pub(crate) const STORE: u8 = 0x63;
pub(crate) const STORE_DOUBLE: u8 = 0x7b;
/// Loads the address of a map; the instruction takes the room of two.
pub(crate) const LOAD_MAP: u8 = 0x18;
/// Sets a register to a register, or to a value.
pub(crate) const MOVE: u8 = 0xbf;
pub(crate) const SET: u8 = 0xb7;
/// Arithmetic with a value; the last two in the lower half of a register.
pub(crate) const ADD: u8 = 0x07;
pub(crate) const AND: u8 = 0x54;
pub(crate) const SHIFT_RIGHT: u8 = 0x74;
/// Jumps if a register is a value, or is not; if its lower half is not; always.
pub(crate) const EQUAL: u8 = 0x15;
pub(crate) const NOT_EQUAL: u8 = 0x55;
pub(crate) const NOT_EQUAL_WORD: u8 = 0x56;
pub(crate) const ALWAYS: u8 = 0x05;
/// Calls a helper of the kernel's; ends the program.
pub(crate) const CALL: u8 = 0x85;
pub(crate) const EXIT: u8 = 0x95;

/// An instruction, as `struct bpf_insn` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub code: u8,
    pub destination: u8,
    pub source: u8,
    pub offset: i16,
    pub value: i32,
}

impl Instruction {
    /// As the kernel takes it.
    pub(super) fn pack(self) -> u64 {
        u64::from(self.value as u32) << 32
            | u64::from(self.offset as u16) << 16
            | u64::from(self.source << 4 | self.destination) << 8
            | u64::from(self.code)
    }
}

/// A place in a program.
pub(crate) type Label = u32;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Assembler {
    instructions: Vec<Instruction>,
    jumps: Vec<(usize, Label)>,
    labels: HashMap<Label, usize>,
}

impl Assembler {
    /// Adds an instruction.
    pub(crate) fn emit(
        &mut self,
        code: u8,
        destination: u8,
        source: u8,
        offset: i16,
        value: i32,
    ) -> &mut Self {
        self.instructions.push(Instruction { code, destination, source, offset, value });
        self
    }

    /// Adds a jump to a place.
    pub(crate) fn jump(&mut self, code: u8, register: u8, value: i32, to: Label) -> &mut Self {
        self.jumps.push((self.instructions.len(), to));
        self.emit(code, register, 0, 0, value)
    }

    /// Here is a place.
    pub(crate) fn label(&mut self, label: Label) -> &mut Self {
        self.labels.insert(label, self.instructions.len());
        self
    }

    /// The program; `None` if a jump leads nowhere, back, or too far.
    pub(crate) fn finish(mut self) -> Option<Vec<Instruction>> {
        for (at, to) in self.jumps {
            let distance = self.labels.get(&to)?.checked_sub(at + 1)?;
            self.instructions[at].offset = i16::try_from(distance).ok()?;
        }
        Some(self.instructions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_lead_forward_to_their_labels() {
        let mut code = Assembler::default();
        code.jump(EQUAL, 1, -1, 7).emit(EXIT, 0, 0, 0, 0).label(7).emit(EXIT, 0, 0, 0, 0);
        let program = code.finish().unwrap();
        assert_eq!(program[0].pack(), 0xffff_ffff_0001_0115);
        let mut nowhere = Assembler::default();
        nowhere.jump(ALWAYS, 0, 0, 1);
        assert_eq!(nowhere.finish(), None);
        let mut back = Assembler::default();
        back.label(1).jump(ALWAYS, 0, 0, 1);
        assert_eq!(back.finish(), None);
    }
}
